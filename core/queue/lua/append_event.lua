-- Append an event of the worker's to the job's history.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  attempt
-- ARGV[4]  worker
-- ARGV[5]  type
-- ARGV[6]  message
-- ARGV[7]  level
-- ARGV[8]  data, JSON, or ''
--
-- Answers {'ok', event id} or {'lost'}.

if not holds(ARGV[1], ARGV[2], ARGV[3], ARGV[4]) then return {'lost'} end

-- Events that tell of a state to go on from.
local STATES = {checkpoint = true, epoch_ended = true, state_saved = true}
if STATES[ARGV[5]] then
  local step = cjson.decode(ARGV[8] ~= '' and ARGV[8] or '{}').step
  if type(step) == 'number' then
    redis.call('HSET', job_key(ARGV[1], ARGV[2]), 'step', string.format('%d', step))
  end
end
return {'ok', add_event(ARGV[1], ARGV[2], ARGV[5], ARGV[6], ARGV[7], ARGV[8] ~= '' and ARGV[8])}
