curl http://127.0.0.1:8000/api -X PUT -H 'Content-Type: application/json' -d '{
  "prompts": ["human: What does galaxy mean?\n\nadept:"],
  "tokens_to_generate": 20,
  "top_k": 1
}'
