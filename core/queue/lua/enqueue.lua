-- Add a job; one that exists is returned unchanged, and a repeated request adds none.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  kind
-- ARGV[4]  spec, JSON
-- ARGV[5]  priority
-- ARGV[6]  most unfinished jobs of this tenant and kind
-- ARGV[7]  retention of a finished job, seconds
-- ARGV[8]  how a repeat of the request is known (core.jobs.Once), JSON, or ''
-- ARGV[9]  what is expected of the job (core.jobs.Estimate), JSON, or ''
-- ARGV[10…] ids of the jobs that must succeed first
--
-- Answers {'ok', id, record}, {'reused', id}, {'forgotten', id}, {'missing', id} or {'full'}.

local tenant, id, kind, retention = ARGV[1], ARGV[2], ARGV[3], ARGV[7]
local key, index = job_key(tenant, id), line_key(tenant, 'jobs', kind)

if redis.call('EXISTS', key) == 1 then return {'ok', id, record(tenant, id)} end

local once = ARGV[8] ~= '' and cjson.decode(ARGV[8])
local recalled = once and recall(tenant, once)
if recalled then return recalled end

local waiting, failure = {}, false
for n = 10, #ARGV do
  local first = redis.call('HMGET', job_key(tenant, ARGV[n]), 'status', 'error')
  local status = first[1]
  if not status then return {'missing', ARGV[n]} end
  if status == 'failed' or status == 'cancelled' then
    failure = failure or first[2] or CANCELLED_FILE
  elseif status ~= 'succeeded' then
    waiting[#waiting + 1] = ARGV[n]
  end
end
if redis.call('SCARD', line_key(tenant, 'open', kind)) >= tonumber(ARGV[6]) then return {'full'} end

refuse_if_full()
-- Where nobody lists, this alone keeps the index from growing for ever.
for _, oldest in ipairs(redis.call('ZRANGE', index, 0, 1)) do
  if redis.call('EXISTS', job_key(tenant, oldest)) == 0 then redis.call('ZREM', index, oldest) end
end

local seq = redis.call('INCR', line_key(tenant, 'seq', kind))
redis.call(
  'HSET', key, 'kind', kind, 'status', 'validating_files', 'spec', ARGV[4], 'priority', ARGV[5],
  'attempt', 0, 'created_at', (clock()), 'seq', seq
)
if ARGV[9] ~= '' then redis.call('HSET', key, 'estimate', ARGV[9]) end
redis.call('ZADD', index, seq, id)
if once then remember(tenant, once, id) end
if failure then
  finish(tenant, id, 'failed', false, failure, retention)
  return {'ok', id, record(tenant, id)}
end
redis.call('SADD', line_key(tenant, 'open', kind), id)
if #waiting > 0 then
  redis.call('HSET', key, 'waiting', #waiting)
  for _, first in ipairs(waiting) do redis.call('SADD', waiters_key(tenant, first), id) end
else
  admit(tenant, id, #ARGV >= 10)
end
return {'ok', id, record(tenant, id)}
