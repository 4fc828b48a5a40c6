"""Find, save and restore what the objects of a script hold beside their state_dict."""
