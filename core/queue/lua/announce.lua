-- Append a change to the change feed, if the job is still the worker's.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  attempt
-- ARGV[4]  worker
-- ARGV[5]  change, JSON
-- ARGV[6]  entries that the feed keeps, roughly
--
-- Answers {'ok'} or {'lost'}.

if not holds(ARGV[1], ARGV[2], ARGV[3], ARGV[4]) then return {'lost'} end

redis.call('XADD', root .. ':changes', 'MAXLEN', '~', ARGV[6], '*', 'change', ARGV[5])
return {'ok'}
