curl -N http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "What is a persimmon?"}],
  "temperature": 0,
  "stream": true
}'
