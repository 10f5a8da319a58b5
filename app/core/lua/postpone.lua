-- Make a delivery's next attempt due later.
-- ARGV: delivery, delay (ms), line of its log (JSON), or '' if the attempt it was taken for was not made, its turn.
-- Returns 0 where it is no longer under way, or was asked for again since it was taken.
local id, line = ARGV[1], ARGV[3]
if not redis.call('ZSCORE', OUTBOX, id) then return 0 end
if not is_of_turn(DELIVERY .. id, ARGV[4]) then
  if line ~= '' then remember(DELIVERY .. id, line) end
  return 0
end
redis.call('ZADD', OUTBOX, now() + tonumber(ARGV[2]), id)
if line == '' then
  redis.call('HINCRBY', DELIVERY .. id, 'attempts', -1)
else
  remember(DELIVERY .. id, line)
end
return 1
