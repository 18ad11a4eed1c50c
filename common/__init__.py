"""Everything both backends share; imports no framework, and importing it is light."""
