-- End a job once, with a terminal status.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  attempt
-- ARGV[4]  worker
-- ARGV[5]  status
-- ARGV[6]  result, JSON, or ''
-- ARGV[7]  error, JSON, or ''
-- ARGV[8]  retention of a finished job, seconds
-- ARGV[9]  what the attempt took, seconds, or ''
--
-- Answers {'ok', record} or {'lost'}.

local tenant, id = ARGV[1], ARGV[2]
if not holds(tenant, id, ARGV[3], ARGV[4]) then return {'lost'} end

-- Sums of what jobs of one pace took and of what was expected, in which each older job weighs less.
local WEIGHT_OF_OLDER = 0.8
local MAX_PACES = 1000

local key = job_key(tenant, id)
local job = redis.call('HMGET', key, 'kind', 'estimate')
-- What an attempt took that began in the middle tells nothing.
if ARGV[5] == 'succeeded' and ARGV[9] ~= '' and ARGV[3] == '1' and job[2] then
  local estimate, expected = cjson.decode(job[2]), 0
  for _, seconds in pairs(estimate.stages) do expected = expected + seconds end
  local speeds = shared_key('speeds', job[1])
  local before = redis.call('HGET', speeds, estimate.pace)
  if expected > 0 and (before or redis.call('HLEN', speeds) < MAX_PACES) then
    local took, foreseen = string.match(before or '0 0', '^(%S+) (%S+)$')
    redis.call('HSET', speeds, estimate.pace, string.format('%.6f %.6f',
      WEIGHT_OF_OLDER * tonumber(took) + tonumber(ARGV[9]),
      WEIGHT_OF_OLDER * tonumber(foreseen) + expected))
  end
end

finish(tenant, id, ARGV[5], ARGV[6] ~= '' and ARGV[6], ARGV[7] ~= '' and ARGV[7], ARGV[8])
return {'ok', record(tenant, id)}
