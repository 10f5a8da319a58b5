-- End the jobs whose deadline has passed, whatever they are doing. ARGV: limit, retention (ms).
-- Returns the ids of those that had not ended yet, each with its parameters.
local at, retention, found = now(), tonumber(ARGV[2]), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', at, 'LIMIT', 0, tonumber(ARGV[1]))) do
  redis.call('ZREM', DEADLINES, id)
  local job = redis.call('HMGET', JOB .. id, 'status', 'fence', 'queue', 'params')
  if job[1] and not FINAL[job[1]] then
    if job[1] == 'processing' then
      redis.call('ZREM', RQ .. 'wip:' .. job[3], id .. ':' .. job[2])
      abandon(id, job[2], at)
      redis.call('HINCRBY', JOB .. id, 'fence', 1)
    end
    enter(id, 'expired', at, retention)
    redis.call('PUBLISH', CONTROL, id)
    found[#found + 1] = id
    found[#found + 1] = job[4]
  end
end
return found
