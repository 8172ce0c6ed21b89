-- Note that a job has not published, whatever was thought of it; what was put off counts now.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  attempt
-- ARGV[4]  worker
-- ARGV[5]  retention of a finished job, seconds
--
-- Answers {'ok', record} or {'lost'}.

local tenant, id = ARGV[1], ARGV[2]
if not holds(tenant, id, ARGV[3], ARGV[4]) then return {'lost'} end

local key = job_key(tenant, id)
redis.call('HDEL', key, 'publishing')
local failure = redis.call('HGET', key, 'last_failure')
if wanted(tenant, id) == 'cancel' then
  finish(tenant, id, 'cancelled', false, false, ARGV[5])
elseif failure then
  finish(tenant, id, 'failed', false, failure, ARGV[5])
elseif wanted(tenant, id) == 'pause' then
  park(tenant, id)
end
return {'ok', record(tenant, id)}
