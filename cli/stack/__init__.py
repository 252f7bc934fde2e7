"""All of RenalQ on one machine: supervisor, Postgres, Redis, services and doctor."""
