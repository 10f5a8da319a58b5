-- Say where in their walk jobs are, before they go on. ARGV: id, fence, walk, id, ...; see worker/held.py for the words.
for i = 1, #ARGV, 3 do
  local held = redis.call('HMGET', JOB .. ARGV[i], 'status', 'fence')
  if held[1] == 'processing' and held[2] == ARGV[i + 1] then
    redis.call('HSET', JOB .. ARGV[i], 'walk', ARGV[i + 1] .. ' ' .. ARGV[i + 2])
  end
end
