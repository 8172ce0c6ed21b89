-- Tell what a forecast needs: what runs, how long jobs took, and how many wait.
--
-- KEYS[1]  root
-- ARGV[1]  kind
-- ARGV[2]  most running jobs, and tenants, that are told
--
-- Answers {'ok', now in seconds, {id, spec, claimed at, …}, {pace, seconds, …}, {tenant, pending, …}}.

local kind, last = ARGV[1], tonumber(ARGV[2]) - 1
local running, pending = {}, {}

for _, member in ipairs(redis.call('ZRANGE', shared_key('leases', kind), 0, last)) do
  local tenant, id = split(member)
  local job = redis.call('HMGET', job_key(tenant, id), 'spec', 'claimed_at')
  if job[1] and job[2] then
    running[#running + 1], running[#running + 2], running[#running + 3] = id, job[1], job[2]
  end
end
for _, tenant in ipairs(redis.call('ZRANGE', shared_key('tenants', kind), 0, last)) do
  pending[#pending + 1] = tenant
  pending[#pending + 1] = redis.call('ZCARD', line_key(tenant, 'pending', kind))
end
return {'ok', (clock()), running, redis.call('HGETALL', shared_key('paces', kind)), pending}
