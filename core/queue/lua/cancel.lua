-- Cancel a job that waits, or ask the worker of a running one to stop.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  retention of a finished job, seconds
-- ARGV[4]  '1' to keep the best checkpoint, else '0'
--
-- Answers {'ok', record}, {'missing', id} or {'refused', status}.

local tenant, id = ARGV[1], ARGV[2]
local key = job_key(tenant, id)
local status = redis.call('HGET', key, 'status')

if not status then return {'missing', id} end
if TERMINAL[status] then return {'refused', status} end
-- To end jobs is how room is made.
go_on_if_full()
if ARGV[4] == '1' then redis.call('HSET', key, 'keep_best', 1) end
if status ~= 'running' then
  finish(tenant, id, 'cancelled', false, false, ARGV[3])
elseif redis.call('HGET', key, 'cancel_requested') ~= '1' then
  redis.call('HSET', key, 'cancel_requested', 1)
  add_event(tenant, id, 'cancel_requested', 'The worker was asked to stop.', 'info')
end
return {'ok', record(tenant, id)}
