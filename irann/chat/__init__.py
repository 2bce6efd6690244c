"""Talk with the models: `session` holds the conversation, `widget` and `terminal` are two screens
for it.
"""
