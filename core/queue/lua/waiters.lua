-- Find the jobs that wait for one and of which nothing is expected yet.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id of the job that they wait for
-- ARGV[3]  most jobs
--
-- Answers {'ok', {id, record, id, record, …}}.

local tenant, found = ARGV[1], {}

for _, id in ipairs(redis.call('SMEMBERS', waiters_key(tenant, ARGV[2]))) do
  if #found >= 2 * tonumber(ARGV[3]) then break end
  local key = job_key(tenant, id)
  if redis.call('HEXISTS', key, 'waiting') == 1 and redis.call('HEXISTS', key, 'estimate') == 0 then
    found[#found + 1], found[#found + 2] = id, record(tenant, id)
  end
end
return {'ok', found}
