-- Give a job back at once, because its worker stops or because of what was wanted of it: then it
-- is paused or cancelled. It uses up none of the job's attempts.
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

if comes_back(tenant, id, false, 0, ARGV[5]) then
  add_event(tenant, id, 'job_restarted', 'The worker was stopped; the job starts again.', 'info',
    cjson.encode({
      attempt = tonumber(ARGV[3]), from_step = from_step(tenant, id), reason = 'worker_stopped'
    }))
  add_pending(tenant, id)
end
return {'ok', record(tenant, id)}
