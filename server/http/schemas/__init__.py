"""The JSON of requests and answers: fields, types and limits."""
