curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{
  "prompt": "human: Who are you?\n\nadept:",
  "max_tokens": 40,
  "temperature": 0
}'
