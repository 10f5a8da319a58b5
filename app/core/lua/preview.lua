-- Show those who watch a job how far a picture is. The latest of each image or so are kept, for a minute.
-- ARGV: id, fence, how many to keep, the preview (JSON). Returns 1, or 0 where the fence no longer holds.
local id, fence, kept, preview = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local held = redis.call('HMGET', JOB .. id, 'status', 'fence')
if held[1] ~= 'processing' or held[2] ~= fence then return 0 end
local key, at = PREVIEWS .. id, now()
-- Numbered by the clock, so that the numbers go on after the key has expired.
local last = redis.call('ZREVRANGE', key, 0, 0, 'WITHSCORES')[2]
if last and at <= tonumber(last) then at = tonumber(last) + 1 end
redis.call('ZADD', key, at, preview)
redis.call('ZREMRANGEBYRANK', key, 0, -(kept + 1))
redis.call('EXPIRE', key, 60)
redis.call('PUBLISH', EVENTS .. id, 'preview')
return 1
