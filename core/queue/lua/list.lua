-- Return a page of a tenant's jobs, newest first, and forget those whose record has expired.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  kind
-- ARGV[3]  id of the job that the page begins behind, or ''
-- ARGV[4]  most jobs
--
-- Answers {'ok', {id, record, id, record, …}}; the page behind an unknown job is empty.

local tenant, limit = ARGV[1], tonumber(ARGV[4])
local index = line_key(tenant, 'jobs', ARGV[2])
local bound, page = '+inf', {}
-- Bounds one call: at most this many rounds of `limit` expired ids are skipped.
local ROUNDS = 50

if ARGV[3] ~= '' then
  local seq = redis.call('ZSCORE', index, ARGV[3])
  if not seq then return {'ok', {}} end
  bound = '(' .. seq
end

for _ = 1, ROUNDS do
  local ids = redis.call(
    'ZREVRANGEBYSCORE', index, bound, '-inf', 'WITHSCORES', 'LIMIT', 0, limit
  )
  for n = 1, #ids, 2 do
    local job = record(tenant, ids[n])
    bound = '(' .. ids[n + 1]
    if #job == 0 then
      redis.call('ZREM', index, ids[n])
    elseif #page < 2 * limit then
      page[#page + 1], page[#page + 2] = ids[n], job
    end
  end
  if #ids == 0 or #page >= 2 * limit then break end
end
return {'ok', page}
