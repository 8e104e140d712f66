"""From a variant's folder to answers over HTTP: engines, batching, the OpenAI endpoint."""
