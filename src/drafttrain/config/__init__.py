"""The recipe: gathers the settings of all rooms, and reads them from YAML."""
