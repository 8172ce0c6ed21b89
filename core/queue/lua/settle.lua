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
--
-- Answers {'ok', record} or {'lost'}.

local tenant, id = ARGV[1], ARGV[2]
if not holds(tenant, id, ARGV[3], ARGV[4]) then return {'lost'} end

finish(tenant, id, ARGV[5], ARGV[6] ~= '' and ARGV[6], ARGV[7] ~= '' and ARGV[7], ARGV[8])
return {'ok', record(tenant, id)}
