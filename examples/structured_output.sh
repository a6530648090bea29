curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "messages": [{"role": "user", "content": "What is a persimmon?"}],
  "temperature": 0,
  "response_format": {"type": "json_schema", "json_schema": {"name": "word", "schema": {
    "type": "object", "properties": {"kind": {"enum": ["noun", "verb", "adjective"]}},
    "required": ["kind"], "additionalProperties": false}}}
}'
