-- Note what is expected of a job that has not ended.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  estimate, JSON
--
-- Answers {'ok'} or {'none'}.

local key = job_key(ARGV[1], ARGV[2])
local status = redis.call('HGET', key, 'status')
if not status or TERMINAL[status] then return {'none'} end

redis.call('HSET', key, 'estimate', ARGV[3])
return {'ok'}
