"""What pipelines take and give, declared once: parameters, inputs, stages and figures, by pydantic alone."""
