-- Tell what a forecast needs: what runs, what waits, and how far estimates were off.
--
-- KEYS[1]  root
-- ARGV[1]  kind
-- ARGV[2]  most running jobs, and tenants, that are told
-- ARGV[3]  most pending jobs whose estimates are told, in equal parts of each tenant
--
-- Answers {'ok', now in seconds, {id, claimed at, estimate, progress, …}, {pace, sums, …},
-- {tenant, pending, {estimate, …}, …}}; an estimate or a progress that is not known is ''.

local kind, last = ARGV[1], tonumber(ARGV[2]) - 1
local running, pending = {}, {}

for _, member in ipairs(redis.call('ZRANGE', shared_key('leases', kind), 0, last)) do
  local tenant, id = split(member)
  local job = redis.call('HMGET', job_key(tenant, id), 'claimed_at', 'estimate', 'progress')
  if job[1] then
    for _, field in ipairs({id, job[1], job[2] or '', job[3] or ''}) do
      running[#running + 1] = field
    end
  end
end

local tenants = redis.call('ZRANGE', shared_key('tenants', kind), 0, last)
local share = math.floor(tonumber(ARGV[3]) / math.max(1, #tenants))
for _, tenant in ipairs(tenants) do
  local line, first = line_key(tenant, 'pending', kind), {}
  for _, id in ipairs(redis.call('ZRANGE', line, 0, share - 1)) do
    first[#first + 1] = redis.call('HGET', job_key(tenant, id), 'estimate') or ''
  end
  pending[#pending + 1] = tenant
  pending[#pending + 1] = redis.call('ZCARD', line)
  pending[#pending + 1] = first
end
return {'ok', (clock()), running, redis.call('HGETALL', shared_key('speeds', kind)), pending}
