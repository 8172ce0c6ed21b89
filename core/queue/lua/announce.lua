-- Append a change to the change feed and note what the job has published, if it is the worker's.
-- From then on the job ends as succeeded, whoever ends it.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  attempt
-- ARGV[4]  worker
-- ARGV[5]  change, JSON
-- ARGV[6]  entries that the feed keeps, roughly
-- ARGV[7]  result of the job, JSON
--
-- Answers {'ok'} or {'lost'}.

if not holds(ARGV[1], ARGV[2], ARGV[3], ARGV[4]) then return {'lost'} end

redis.call('HSET', job_key(ARGV[1], ARGV[2]), 'result', ARGV[7])
redis.call('XADD', root .. ':changes', 'MAXLEN', '~', ARGV[6], '*', 'change', ARGV[5])
return {'ok'}
