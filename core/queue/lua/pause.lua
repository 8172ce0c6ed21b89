-- Pause a job that waits, or ask the worker of a running one to stop and save its state.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
--
-- Answers {'ok', record}, {'missing', id} or {'refused', status, 'cancelling', 'publishing' or ''}.

local tenant, id = ARGV[1], ARGV[2]
local key = job_key(tenant, id)
local job = redis.call(
  'HMGET', key, 'status', 'cancel_requested', 'pause_requested', 'publishing', 'result'
)
local status = job[1]

if not status then return {'missing', id} end
if TERMINAL[status] then return {'refused', status, ''} end
if job[2] == '1' then return {'refused', status, 'cancelling'} end
if job[4] == '1' or job[5] then return {'refused', status, 'publishing'} end
if status == 'running' then
  if job[3] ~= '1' then
    redis.call('HSET', key, 'pause_requested', 1)
    add_event(tenant, id, 'pause_requested', 'The worker was asked to pause.', 'info')
  end
elseif status ~= 'paused' then
  park(tenant, id)
end
return {'ok', record(tenant, id)}
