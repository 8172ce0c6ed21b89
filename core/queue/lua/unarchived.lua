-- Return the ended jobs whose records are not known to be in the artifact store, oldest first.
--
-- KEYS[1]  root
-- ARGV[1]  most jobs
--
-- Answers {'ok', {tenant, id, record, tenant, id, record, …}}.

local unarchived, page = root .. ':unarchived', {}

for _, member in ipairs(redis.call('ZRANGE', unarchived, 0, tonumber(ARGV[1]) - 1)) do
  local tenant, id = split(member)
  local job = record(tenant, id)
  if #job == 0 then
    -- An evicted record leaves its id behind.
    redis.call('ZREM', unarchived, member)
  else
    page[#page + 1], page[#page + 2], page[#page + 3] = tenant, id, job
  end
end
return {'ok', page}
