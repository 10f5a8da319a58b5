-- Extend the leases a worker still holds and write what progress it made.
-- ARGV: lease (ms), then per job: id, fence, progress (JSON) or ''. Returns the ids it no longer holds, and those that
-- somebody wants previews of.
local at, lease, lost, watched = now(), tonumber(ARGV[1]), {}, {}
for i = 2, #ARGV, 3 do
  local id, fence, progress = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local held = redis.call('HMGET', JOB .. id, 'status', 'fence', 'committed', 'died')
  -- A job this fence has committed has ended, and is not lost: its objects must stay.
  if held[3] ~= fence and (held[1] ~= 'processing' or held[2] ~= fence) then
    lost[#lost + 1] = id
    -- The worker that was taken for dead lives: the job has not ended it.
    if held[4] == fence and not FINAL[held[1]] then
      redis.call('HINCRBY', JOB .. id, 'deaths', -1)
      redis.call('HDEL', JOB .. id, 'died', 'died_at')
    end
  elseif held[1] == 'processing' then
    redis.call('ZADD', LEASES, at + lease, id)
    if redis.call('ZCOUNT', WATCHERS .. id, at, '+inf') > 0 then watched[#watched + 1] = id end
    if progress ~= '' then
      redis.call('HSET', JOB .. id, 'progress', progress)
      publish(id, 'progress', progress)
    end
  end
end
return {lost, watched}
