-- What the queue's scripts share; core.queue.redis puts this file in front of each of them.
--
-- KEYS[1]  root, `<prefix>:{graft}`: the common part of every key, and what Cluster routes by.
--          It holds nothing itself; core/queue/redis.py lists the keys below it.
--
-- A script answers with a word first: ok, none, lost, missing, refused, full, reused or forgotten.

local root = KEYS[1]
local MAX_EVENTS = 10000
local MAX_COMPACTED = 200
local CANCELLED_FILE = cjson.encode({
  code = 'data_error', message = "The validation of the job's file was cancelled."
})
-- How often more than others a job that may have published is tried: it must end with the truth, but
-- one that kills whoever publishes it must not do so for ever.
local PUBLISHING_LOSSES = 20
-- Whether what became of a job must outlast Redis: what became of a file its parser has told, unless
-- that failed.
local function is_archived(kind, status) return kind == 'fine_tune' or status == 'failed' end
local ENDINGS = {succeeded = 'The job succeeded.', cancelled = 'The job was cancelled.'}
local TERMINAL = {succeeded = true, failed = true, cancelled = true}

local function job_key(tenant, id) return root .. ':t:' .. tenant .. ':job:' .. id end
local function events_key(tenant, id) return root .. ':t:' .. tenant .. ':events:' .. id end
local function waiters_key(tenant, id) return root .. ':t:' .. tenant .. ':waiters:' .. id end
local function line_key(tenant, name, kind)
  return root .. ':t:' .. tenant .. ':' .. name .. ':' .. kind
end
local function shared_key(name, kind) return root .. ':' .. name .. ':' .. kind end

-- Server time as text in seconds, and as a number in milliseconds.
local function clock()
  local time = redis.call('TIME')
  local seconds, micros = tonumber(time[1]), tonumber(time[2])
  return string.format('%d.%06d', seconds, micros), seconds * 1000 + math.floor(micros / 1000)
end

-- Redis that is full (maxmemory, noeviction) refuses a script at its first command that may take
-- memory, unless the script has written before. So what would take on new work asks first, and is
-- refused whole; what ends or carries on the work taken on writes first, and is let through: what
-- that adds is bounded, and refusing it would cost running jobs their leases. Neither changes a key.
local function refuse_if_full() redis.call('SETRANGE', root, 0, '') end
local function go_on_if_full() redis.call('DEL', root) end

local function split(member) return string.match(member, '^([^/]*)/(.*)$') end

local function add_event(tenant, id, type, message, level, data)
  local fields = {'type', type, 'message', message}
  if level ~= 'info' then
    fields[#fields + 1], fields[#fields + 2] = 'level', level
  end
  if data then
    fields[#fields + 1], fields[#fields + 2] = 'data', data
  end
  return redis.call(
    'XADD', events_key(tenant, id), 'MAXLEN', '~', MAX_EVENTS, '*', unpack(fields)
  )
end

-- A stream reserves 4 kB for entries to come, a restored one none: thousands of waiting and
-- finished jobs need not hold that. Where an ACL forbids it, the stream stays as it is.
local function compact_events(tenant, id)
  local key = events_key(tenant, id)
  if redis.call('XLEN', key) <= MAX_COMPACTED then
    local dump = redis.pcall('DUMP', key)
    if type(dump) == 'string' then redis.pcall('RESTORE', key, 0, dump, 'REPLACE') end
  end
end

local function wake(kind)
  redis.call('XADD', shared_key('wake', kind), 'MAXLEN', 1, '*', 'kind', kind)
end

-- Put a job in its place in the tenant's line: higher priority first, then older.
local function add_pending(tenant, id)
  local job = redis.call('HMGET', job_key(tenant, id), 'kind', 'priority', 'seq')
  local kind = job[1]
  local score = (100 - tonumber(job[2])) * 2 ^ 44 + tonumber(job[3])
  redis.call('ZADD', line_key(tenant, 'pending', kind), string.format('%.0f', score), id)
  -- A tenant that comes back goes behind those that are waiting, or it could starve them.
  local tenants = shared_key('tenants', kind)
  local last = redis.call('ZREVRANGE', tenants, 0, 0, 'WITHSCORES')[2] or 0
  redis.call('ZADD', tenants, 'NX', tonumber(last) + 1, tenant)
  wake(kind)
end

local function remove_pending(tenant, id, kind)
  local pending = line_key(tenant, 'pending', kind)
  redis.call('ZREM', pending, id)
  if redis.call('EXISTS', pending) == 0 then
    redis.call('ZREM', shared_key('tenants', kind), tenant)
  end
end

-- Let a job out of validating_files; a paused one stays paused.
local function admit(tenant, id, waited)
  local key = job_key(tenant, id)
  redis.call('HDEL', key, 'waiting')
  if waited then add_event(tenant, id, 'validated', 'The files of the job are ready.', 'info') end
  if redis.call('HGET', key, 'status') == 'paused' then return end
  redis.call('HSET', key, 'status', 'queued')
  add_event(tenant, id, 'queued', 'The job waits for a worker.', 'info')
  compact_events(tenant, id)
  add_pending(tenant, id)
end

-- Note that a job is no worker's any more; whoever waits may take one that a cap held back.
local function leave_worker(tenant, id, kind)
  redis.call('ZREM', shared_key('leases', kind), tenant .. '/' .. id)
  if redis.call('SREM', line_key(tenant, 'running', kind), id) == 1
    and redis.call('EXISTS', line_key(tenant, 'pending', kind)) == 1 then
    wake(kind)
  end
end

local function expire_job(tenant, id, retention)
  redis.call('EXPIRE', job_key(tenant, id), retention)
  redis.call('EXPIRE', events_key(tenant, id), retention)
end

-- End one job; `result` and `failure` are JSON text or false. One whose record must last is kept
-- until it is known to be in the artifact store, and only then expires.
local function end_job(tenant, id, status, result, failure, retention)
  local key = job_key(tenant, id)
  local kind = redis.call('HGET', key, 'kind')
  redis.call('HSET', key, 'status', status, 'finished_at', (clock()))
  redis.call('HDEL', key, 'waiting', 'progress', 'publishing', 'pause_requested', 'last_failure')
  if result then redis.call('HSET', key, 'result', result) end
  if failure then redis.call('HSET', key, 'error', failure) end
  remove_pending(tenant, id, kind)
  redis.call('ZREM', shared_key('delayed', kind), tenant .. '/' .. id)
  leave_worker(tenant, id, kind)
  redis.call('SREM', line_key(tenant, 'open', kind), id)
  if status == 'failed' then
    local reason = cjson.decode(failure)
    add_event(tenant, id, 'failed', reason.message, 'error', cjson.encode({code = reason.code}))
  else
    add_event(tenant, id, status, ENDINGS[status], 'info')
  end
  compact_events(tenant, id)
  if is_archived(kind, status) then
    redis.call('ZADD', root .. ':unarchived', (clock()), tenant .. '/' .. id)
  else
    expire_job(tenant, id, retention)
  end
end

-- End a job, and free or fail what waits for it, and what waits for that.
local function finish(tenant, id, status, result, failure, retention)
  local ending = {{id, status, result, failure}}
  while #ending > 0 do
    local job = table.remove(ending)
    end_job(tenant, job[1], job[2], job[3], job[4], retention)
    local waiters = waiters_key(tenant, job[1])
    for _, waiter in ipairs(redis.call('SMEMBERS', waiters)) do
      -- A paused job may wait as well: then it learns of its files, and goes nowhere yet.
      if redis.call('HEXISTS', job_key(tenant, waiter), 'waiting') == 1 then
        if job[2] ~= 'succeeded' then
          ending[#ending + 1] = {waiter, 'failed', false, job[4] or CANCELLED_FILE}
        elseif redis.call('HINCRBY', job_key(tenant, waiter), 'waiting', -1) == 0 then
          admit(tenant, waiter, true)
        end
      end
    end
    redis.call('DEL', waiters)
  end
end

-- Put a job aside until it is resumed or cancelled.
local function park(tenant, id)
  local key = job_key(tenant, id)
  local kind = redis.call('HGET', key, 'kind')
  remove_pending(tenant, id, kind)
  redis.call('ZREM', shared_key('delayed', kind), tenant .. '/' .. id)
  leave_worker(tenant, id, kind)
  redis.call('HSET', key, 'status', 'paused')
  redis.call('HDEL', key, 'worker', 'progress', 'pause_requested')
  add_event(tenant, id, 'paused', 'The job is paused.', 'info')
  compact_events(tenant, id)
end

-- What is wanted of a running job: 'cancel', 'pause' or ''. Of one that may have published nothing
-- is, until it is known whether it has.
local function wanted(tenant, id)
  local job = redis.call(
    'HMGET', job_key(tenant, id), 'publishing', 'cancel_requested', 'pause_requested'
  )
  if job[1] == '1' then return '' end
  return job[2] == '1' and 'cancel' or job[3] == '1' and 'pause' or ''
end

-- Give a running job what it is due, now that no worker has it: true when it is to run again, in
-- which case it is neither a worker's nor in the line yet. `failure` is JSON text when an attempt
-- is used up, or false. What was published is told first; what may have been, by another attempt.
local function comes_back(tenant, id, failure, max_attempts, retention)
  local key = job_key(tenant, id)
  local job = redis.call('HMGET', key, 'kind', 'result', 'publishing')
  local losses = failure and redis.call('HINCRBY', key, 'losses', 1) or 0
  local is_publishing = job[3] == '1'
  local limit = tonumber(max_attempts) + (is_publishing and PUBLISHING_LOSSES or 0)
  local want = wanted(tenant, id)
  if job[2] then
    finish(tenant, id, 'succeeded', job[2], false, retention)
  elseif want == 'cancel' then
    finish(tenant, id, 'cancelled', false, false, retention)
  elseif failure and losses >= limit then
    finish(tenant, id, 'failed', false, failure, retention)
  elseif want == 'pause' then
    park(tenant, id)
  else
    if is_publishing and failure and losses >= tonumber(max_attempts) then
      redis.call('HSET', key, 'last_failure', failure)
    end
    leave_worker(tenant, id, job[1])
    redis.call('HSET', key, 'status', 'queued')
    redis.call('HDEL', key, 'worker', 'progress')
    return true
  end
  return false
end

-- The step that the next attempt goes on from: that of the newest state saved, or 0.
local function from_step(tenant, id)
  return tonumber(redis.call('HGET', job_key(tenant, id), 'step') or 0)
end

-- The fence: only the worker of the current attempt may write, and it may when Redis is full.
local function holds(tenant, id, attempt, worker)
  go_on_if_full()
  local job = redis.call('HMGET', job_key(tenant, id), 'status', 'attempt', 'worker')
  return job[1] == 'running' and job[2] == attempt and job[3] == worker
end

local function record(tenant, id) return redis.call('HGETALL', job_key(tenant, id)) end

local function once_key(tenant, name) return root .. ':t:' .. tenant .. ':once:' .. name end

-- Answer a repeated request: {'ok', id, record}, {'reused', id}, {'forgotten', id}, or nil for one
-- that is new. `once` is a core.jobs.Once.
local function recall(tenant, once)
  local first = redis.call('HMGET', once_key(tenant, once.name), 'job', 'digest', 'repeated_ms')
  local id = first[1]
  if not id then return nil end
  if first[2] ~= once.digest then return {'reused', id} end
  if not once.is_repeat then
    -- What a repeat left after this request had arrived, this request's repeat left.
    local _, now_ms = clock()
    if not first[3] or tonumber(first[3]) < now_ms - once.age_seconds * 1000 then return nil end
  end
  local job = record(tenant, id)
  if #job == 0 then return {'forgotten', id} end
  return {'ok', id, job}
end

local function remember(tenant, once, id)
  local key = once_key(tenant, once.name)
  redis.call('DEL', key)
  redis.call('HSET', key, 'job', id, 'digest', once.digest)
  if once.is_repeat then
    local _, now_ms = clock()
    redis.call('HSET', key, 'repeated_ms', now_ms)
  end
  redis.call('EXPIRE', key, once.seconds)
end
