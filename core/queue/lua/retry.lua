-- Give a job back to be started again after a delay; end it when no attempt is left.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  attempt
-- ARGV[4]  worker
-- ARGV[5]  delay, seconds
-- ARGV[6]  failure, JSON
-- ARGV[7]  most attempts of a job that may be lost
-- ARGV[8]  retention of a finished job, seconds
--
-- Answers {'ok', record} or {'lost'}.

local tenant, id, attempt, delay = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[5])
if not holds(tenant, id, ARGV[3], ARGV[4]) then return {'lost'} end

local kind = redis.call('HGET', job_key(tenant, id), 'kind')
if comes_back(tenant, id, ARGV[6], ARGV[7], ARGV[8]) then
  local reason = cjson.decode(ARGV[6]).message
  add_event(tenant, id, 'retrying', 'The job starts again: ' .. reason, 'warn',
    cjson.encode({attempt = attempt, delay_seconds = delay, reason = reason}))
  if delay > 0 then
    local _, now_ms = clock()
    redis.call(
      'ZADD', shared_key('delayed', kind), now_ms + math.ceil(delay * 1000), tenant .. '/' .. id
    )
    -- Who waits already must learn that there is an earlier moment to look again.
    wake(kind)
  else
    add_pending(tenant, id)
  end
end
return {'ok', record(tenant, id)}
