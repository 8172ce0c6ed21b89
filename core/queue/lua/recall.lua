-- Find the job that an earlier request made and this one repeats.
--
-- KEYS[1]  root
-- ARGV[1]  tenant
-- ARGV[2]  how the repeat is known (core.jobs.Once), JSON
--
-- Answers {'ok', id, record}, {'reused', id}, {'forgotten', id}, or {'none'}.

return recall(ARGV[1], cjson.decode(ARGV[2])) or {'none'}
