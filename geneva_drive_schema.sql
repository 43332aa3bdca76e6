-- GenevaDrive: what Peewee's models cannot say.
--
-- The tables themselves are created from the models in geneva_drive.py:
--
--   geneva_drive_workflows         one row for each workflow: its hero, its state, the step it stands at, its context
--   geneva_drive_step_executions   one row for each attempt at a step; deleted with its workflow
--   geneva_drive_signals           one row for each signal that a workflow was sent; deleted with its workflow
--   geneva_drive_schema            one row for each version of all this that the database was brought to
--
-- A workflow is ready (a step is scheduled), performing (a step runs), paused, finished or canceled. An execution is
-- scheduled, waiting or in progress: active; and then completed, failed, canceled or skipped, for good.
--
-- What is to be given out, and nothing else, has the name of a queue: what is scheduled, or waits with a limit, in a
-- workflow that is ready. It is taken by whoever looks first once it is due, the highest priority first.
--
-- Three promises are kept by unique indexes, whatever the processes do:
--
--   geneva_drive_one_ongoing_workflow   one ongoing workflow for each class and hero (allow_multiple aside)
--   geneva_drive_one_active_execution   one active execution for each workflow
--   geneva_drive_occurrence             one workflow for each minute at which a class recurs
--
-- GenevaDrive.create_tables() creates the missing tables, adds the columns that the models have and the tables lack,
-- applies the sections that the database needs, of each what is not there yet, and records the version. To apply one
-- section by hand, run the statements between its line and that of the next section, after the tables were created.
-- Each statement must be one of `create index`, `create unique index`, `create trigger` and `alter table ... add column`,
-- and end with a semicolon at the end of a line: these are told by name from what is there already.
--
-- The code of one version works beside that of the next, on the tables of the newer: so a version only adds. A column is
-- nullable and has no default, which makes adding it a matter of moments; what has to be another one gets another name.


-- section: every database

-- The history of a workflow in its order; no two executions share a number.
create unique index geneva_drive_execution_number on geneva_drive_step_executions (workflow_id, number);

-- Workflow.for_hero(), over finished and canceled ones too.
create index geneva_drive_hero on geneva_drive_workflows (hero_id, hero_type);

-- The signals of a workflow by their name; a key that is delivered again is refused. NULLs differ from each other:
-- signals without a key are all new.
create unique index geneva_drive_signal_key on geneva_drive_signals (workflow_id, name, idempotency_key);


-- section: postgresql, sqlite

-- One ongoing workflow for each class and hero. NULLs differ from each other: without a hero there is no limit.
create unique index geneva_drive_one_ongoing_workflow on geneva_drive_workflows (type, hero_type, hero_id)
    where state in ('ready', 'performing', 'paused') and not allow_multiple;

-- One active execution for each workflow.
create unique index geneva_drive_one_active_execution on geneva_drive_step_executions (workflow_id)
    where state in ('scheduled', 'waiting', 'in_progress');

-- The order in which executions are given out.
create index geneva_drive_queue on geneva_drive_step_executions (queue, priority, due_at, id) where queue is not null;

-- One workflow for each class that recurs and each of its moments. Others have none, and no entry.
create unique index geneva_drive_occurrence on geneva_drive_workflows (type, occurs_at) where occurs_at is not null;

-- Housekeeping: whose process fell silent, what is over long since; by type, each of which may be kept for another time.
-- Partial, for an index on the state alone is taken by PostgreSQL's planner in the place of the primary key.
create index geneva_drive_silent on geneva_drive_step_executions (heartbeat_at, id) where state = 'in_progress';
create index geneva_drive_over on geneva_drive_workflows (type, transitioned_at, id)
    where state in ('finished', 'canceled');

-- The children of a workflow; and, for housekeeping, the workflows that count children as ongoing.
create index geneva_drive_children on geneva_drive_workflows (parent_id, state) where parent_id is not null;
create index geneva_drive_parents on geneva_drive_workflows (ongoing_children) where ongoing_children > 0;

-- What operators look for: the paused ones, the newest first. On MySQL and MariaDB, geneva_drive_over has them.
create index geneva_drive_paused on geneva_drive_workflows (id) where state = 'paused';


-- section: sqlite

-- Executions and signals are deleted with their workflow, and children lose their parent, as the foreign keys say; SQLite
-- obeys them only where a connection asks for that, and gives the id of a deleted workflow to a new one.
create trigger geneva_drive_delete_executions after delete on geneva_drive_workflows
    begin delete from geneva_drive_step_executions where workflow_id = old.id; end;
create trigger geneva_drive_delete_signals after delete on geneva_drive_workflows
    begin delete from geneva_drive_signals where workflow_id = old.id; end;
create trigger geneva_drive_orphan_children after delete on geneva_drive_workflows
    begin update geneva_drive_workflows set parent_id = null where parent_id = old.id; end;


-- section: mysql

-- MySQL and MariaDB have no partial indexes: a generated column is 1 for the rows that count and NULL for the others,
-- and NULLs differ from each other. Nothing is concatenated, so that no two heroes can be taken for one; the columns
-- are VARBINARY, since the collations ignore case, or spaces at the end, or are not known to both.
alter table geneva_drive_workflows add column ongoing tinyint generated always as
    (case when state in ('ready', 'performing', 'paused') and not allow_multiple then 1 end) stored;
create unique index geneva_drive_one_ongoing_workflow on geneva_drive_workflows (type, hero_type, hero_id, ongoing);

alter table geneva_drive_step_executions add column active tinyint generated always as
    (case when state in ('scheduled', 'waiting', 'in_progress') then 1 end) stored;
create unique index geneva_drive_one_active_execution on geneva_drive_step_executions (workflow_id, active);

-- The order in which executions are given out.
create index geneva_drive_queue on geneva_drive_step_executions (queue, priority, due_at, id);

-- One workflow for each class that recurs and each of its moments. Others have none, and NULLs differ from each other.
create unique index geneva_drive_occurrence on geneva_drive_workflows (type, occurs_at);

-- Housekeeping: whose process fell silent, what is over long since; by type, each of which may be kept for another time.
create index geneva_drive_silent on geneva_drive_step_executions (state, heartbeat_at, id);
create index geneva_drive_over on geneva_drive_workflows (state, type, transitioned_at, id);

-- The children of a workflow, those that go on first; and, for housekeeping, the workflows that count children as ongoing.
-- The state would be another one, to be written anew, with each step of workflows that have no parent too.
create index geneva_drive_children on geneva_drive_workflows (parent_id, transitioned_at);
create index geneva_drive_parents on geneva_drive_workflows (ongoing_children);
