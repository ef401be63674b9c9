"""The eICU Collaborative Research Database: unit stays of many hospitals, times as minutes."""
