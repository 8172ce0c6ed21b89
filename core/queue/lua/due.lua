-- Tell when time alone will make a job of a kind claimable: a lease that runs out, a delay that ends.
--
-- KEYS[1]  root
-- ARGV[1]  kind
--
-- Answers {'ok', milliseconds from now}, 0 when one is due, or {'none'}.

local _, now_ms = clock()
local due = nil
for _, name in ipairs({'leases', 'delayed'}) do
  local score = redis.call('ZRANGE', shared_key(name, ARGV[1]), 0, 0, 'WITHSCORES')[2]
  if score and (not due or tonumber(score) < due) then due = tonumber(score) end
end
if not due then return {'none'} end
return {'ok', math.max(0, due - now_ms)}
