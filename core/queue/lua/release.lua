-- Give a job back at once because its worker stops; it uses up none of the job's attempts.
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
if redis.call('HGET', key, 'cancel_requested') == '1' then
  finish(tenant, id, 'cancelled', false, false, ARGV[5])
else
  redis.call('HSET', key, 'status', 'queued')
  redis.call('HDEL', key, 'worker', 'progress')
  redis.call('ZREM', shared_key('leases', redis.call('HGET', key, 'kind')), tenant .. '/' .. id)
  add_event(tenant, id, 'job_restarted', 'The worker was stopped; the job starts again.', 'info',
    cjson.encode({attempt = tonumber(ARGV[3]), reason = 'worker_stopped'}))
  add_pending(tenant, id)
end
return {'ok', record(tenant, id)}
