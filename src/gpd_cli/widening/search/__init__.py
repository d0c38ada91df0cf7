"""The search for a width plan: by arithmetic where possible, else by trial."""
