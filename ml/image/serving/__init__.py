"""Use of a trained network: predictions, dispositions, Grad-CAM explanations, the drift reference."""
