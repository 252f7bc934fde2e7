"""MLflow's tracking server: started behind a login, and confined to a folder of its own."""
