-- Let a paused job go on: back to its old place in the line, or to waiting for its files.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
--
-- Answers {'ok', record}, {'missing', id} or {'refused', status, 'pausing' or ''}.

local tenant, id = ARGV[1], ARGV[2]
local key = job_key(tenant, id)
local job = redis.call('HMGET', key, 'status', 'waiting', 'pause_requested')

if not job[1] then return {'missing', id} end
if job[1] ~= 'paused' then return {'refused', job[1], job[3] == '1' and 'pausing' or ''} end
add_event(tenant, id, 'resumed', 'The job goes on.', 'info')
if job[2] then
  redis.call('HSET', key, 'status', 'validating_files')
else
  redis.call('HSET', key, 'status', 'queued')
  add_pending(tenant, id)
end
return {'ok', record(tenant, id)}
