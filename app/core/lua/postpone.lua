-- Make a delivery's next attempt due later. ARGV: delivery, delay (ms), '1' if the attempt it was taken for was made.
local id = ARGV[1]
if not redis.call('ZSCORE', OUTBOX, id) then return 0 end
redis.call('ZADD', OUTBOX, now() + tonumber(ARGV[2]), id)
if ARGV[3] ~= '1' then redis.call('HINCRBY', DELIVERY .. id, 'attempts', -1) end
return 1
