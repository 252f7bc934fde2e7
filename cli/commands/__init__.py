"""The commands of `renalq`, one file per kind of resource."""
