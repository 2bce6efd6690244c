"""Talk with the models: `session` holds the conversation; `widget` and `terminal` show it."""
