-- Renew a lease; one that has run out but was not taken back may still be renewed.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  attempt
-- ARGV[4]  worker
-- ARGV[5]  lease, milliseconds
-- ARGV[6]  progress, JSON, or '' to leave it
-- ARGV[7]  what all attempts have run so far, seconds, or '' to leave it
--
-- Answers {'ok', what is wanted: 'cancel', 'pause' or ''} or {'lost'}.

local tenant, id = ARGV[1], ARGV[2]
if not holds(tenant, id, ARGV[3], ARGV[4]) then return {'lost'} end

local key = job_key(tenant, id)
local _, now_ms = clock()
local leases = shared_key('leases', redis.call('HGET', key, 'kind'))
redis.call('ZADD', leases, now_ms + tonumber(ARGV[5]), tenant .. '/' .. id)
if ARGV[6] ~= '' then redis.call('HSET', key, 'progress', ARGV[6]) end
if ARGV[7] ~= '' then redis.call('HSET', key, 'ran_seconds', ARGV[7]) end
return {'ok', wanted(tenant, id)}
