-- Hand a job back unfinished, without using up a try. ARGV: id, fence. Returns 'done' or 'lost'.
local id, fence = ARGV[1], ARGV[2]
local held = redis.call('HMGET', JOB .. id, 'status', 'fence', 'queue', 'alone')
if held[1] ~= 'processing' or held[2] ~= fence then return 'lost' end
redis.call('HINCRBY', JOB .. id, 'tries', -1)
requeue(id, held[3], now(), held[4] == '1')
return 'done'
