-- Somebody watches a job being made, or goes on watching, or no longer does.
-- ARGV: id, the watcher's name, for how long unless it says so again (ms; 0: it is gone).
local id, watcher, lasting = ARGV[1], ARGV[2], tonumber(ARGV[3])
local key, at = WATCHERS .. id, now()
if lasting == 0 then return redis.call('ZREM', key, watcher) end
redis.call('ZADD', key, at + lasting, watcher)
redis.call('ZREMRANGEBYSCORE', key, '-inf', at)
return redis.call('PEXPIRE', key, lasting)
