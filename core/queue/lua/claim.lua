-- Take back what dead workers held, then lease the next job to this one.
--
-- KEYS[1]  root
-- ARGV[1]  kind
-- ARGV[2]  worker
-- ARGV[3]  lease, milliseconds
-- ARGV[4]  most attempts of a job that may be lost
-- ARGV[5]  retention of a finished job, seconds
-- ARGV[6]  most jobs of a tenant and kind that run at once, 0 for any number
--
-- Answers {'ok', tenant, id, record}, or {'none', id of the last entry of the wake stream}: a
-- worker that waits behind this entry misses nothing that came after the claim.

local kind, worker, lease, max_attempts, retention = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local max_running = tonumber(ARGV[6])
local leases, delayed = shared_key('leases', kind), shared_key('delayed', kind)
local tenants = shared_key('tenants', kind)
local now, now_ms = clock()
-- Bounds one call, for nothing else runs on the server meanwhile; the next call does the rest.
local STEPS = 100

-- A claim that fails half-way, or whose worker could then not tell of it, would cost an attempt.
refuse_if_full()

for _, member in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms, 'LIMIT', 0, STEPS)) do
  local tenant, id = split(member)
  local key = job_key(tenant, id)
  local job = redis.call('HMGET', key, 'status', 'attempt', 'losses')
  redis.call('ZREM', leases, member)
  if job[1] == 'running' then
    local losses = string.format('%d', tonumber(job[3] or 0) + 1)
    local failure = cjson.encode({
      code = 'worker_lost', message = 'The worker was lost in each of ' .. losses .. ' attempts.'
    })
    if comes_back(tenant, id, failure, max_attempts, retention) then
      add_event(tenant, id, 'job_restarted', 'The worker was lost; the job starts again.', 'warn',
        cjson.encode({
          attempt = tonumber(job[2]), from_step = from_step(tenant, id), reason = 'worker_lost'
        }))
      add_pending(tenant, id)
    end
  end
end

for _, member in ipairs(redis.call('ZRANGEBYSCORE', delayed, '-inf', now_ms, 'LIMIT', 0, STEPS)) do
  local tenant, id = split(member)
  redis.call('ZREM', delayed, member)
  if redis.call('HGET', job_key(tenant, id), 'status') == 'queued' then add_pending(tenant, id) end
end

-- Tenants that have as many running jobs as they may pass their turn.
local passed = {}

for _ = 1, STEPS do
  local tenant = redis.call('ZRANGE', tenants, 0, 0)[1]
  if not tenant or passed[tenant] then break end
  local pending = line_key(tenant, 'pending', kind)
  local running = line_key(tenant, 'running', kind)
  local id = nil
  if max_running > 0 and redis.call('SCARD', running) >= max_running then
    passed[tenant] = true
  else
    id = redis.call('ZPOPMIN', pending)[1]
  end
  if redis.call('EXISTS', pending) == 0 then
    redis.call('ZREM', tenants, tenant)
  else
    local last = redis.call('ZREVRANGE', tenants, 0, 0, 'WITHSCORES')[2]
    redis.call('ZADD', tenants, tonumber(last) + 1, tenant)
  end
  -- An evicted record leaves its id behind.
  if id and redis.call('HGET', job_key(tenant, id), 'status') == 'queued' then
    local key = job_key(tenant, id)
    local attempt = redis.call('HINCRBY', key, 'attempt', 1)
    redis.call('HSET', key, 'status', 'running', 'worker', worker, 'claimed_at', now)
    redis.call('SADD', running, id)
    redis.call('HSETNX', key, 'started_at', now)
    redis.call('ZADD', leases, now_ms + tonumber(lease), tenant .. '/' .. id)
    add_event(tenant, id, 'started', 'A worker started attempt ' .. attempt .. '.', 'info',
      cjson.encode({attempt = attempt, worker = worker}))
    return {'ok', tenant, id, record(tenant, id)}
  end
end

local last = redis.call('XREVRANGE', shared_key('wake', kind), '+', '-', 'COUNT', 1)[1]
return {'none', last and last[1] or '0-0'}
