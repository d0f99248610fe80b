"""stub"""
choose_plan = None
