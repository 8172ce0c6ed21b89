-- Let an ended job expire, now that its record is in the artifact store.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  id
-- ARGV[3]  retention of a finished job, seconds
--
-- Answers {'ok'}; doing it again changes nothing.

if redis.call('ZREM', root .. ':unarchived', ARGV[1] .. '/' .. ARGV[2]) == 1 then
  expire_job(ARGV[1], ARGV[2], ARGV[3])
end
return {'ok'}
