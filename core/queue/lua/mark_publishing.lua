-- Note that a job may publish from now on, unless something else is wanted of it; renew its lease.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  attempt
-- ARGV[4]  worker
-- ARGV[5]  lease, milliseconds
--
-- Answers {'ok', what is wanted instead: 'cancel', 'pause' or ''} or {'lost'}.

local tenant, id = ARGV[1], ARGV[2]
if not holds(tenant, id, ARGV[3], ARGV[4]) then return {'lost'} end

local key = job_key(tenant, id)
local _, now_ms = clock()
local leases = shared_key('leases', redis.call('HGET', key, 'kind'))
redis.call('ZADD', leases, now_ms + tonumber(ARGV[5]), tenant .. '/' .. id)
local instead = wanted(tenant, id)
if instead == '' then redis.call('HSET', key, 'publishing', 1) end
return {'ok', instead}
