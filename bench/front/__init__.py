"""What the API's own worker costs honest clients, beside gunicorn's."""
